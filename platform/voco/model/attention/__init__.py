"""Which tokens may attend to which, and the kernels that honour it exactly: one file a backend."""
