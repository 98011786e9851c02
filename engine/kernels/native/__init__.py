"""C++ kernels for CPUs, compiled for the machine they run on where there is a compiler."""
