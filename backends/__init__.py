"""What a Program becomes: each folder here turns one into an artefact and checks it."""
