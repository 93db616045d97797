"""What a kernel computes, what it takes, and how its weights are packed; nothing here imports TVM."""
