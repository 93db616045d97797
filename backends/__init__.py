"""What a Program becomes: each folder here turns one into an artifact and checks it."""
