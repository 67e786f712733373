"""How a binary starts and ends: command line, devices, processes, compilation cache."""
