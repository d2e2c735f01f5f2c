"""Analyses the code that the compiler generates for a GPU, on a machine without one."""
