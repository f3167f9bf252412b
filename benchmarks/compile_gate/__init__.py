"""Compiles every Triton kernel without a GPU and checks registers, spills, shared memory and loads."""
