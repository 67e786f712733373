"""Start and end a command: command line, devices, processes, compilation cache."""
