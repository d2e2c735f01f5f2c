"""What the compiler makes of a training step for a GPU, found out on a machine without one."""
