"""Who may attend to whom, and the kernels that honour it."""
