"""Disk: files and tensors that survive a kill at any instant. Knows nothing of bases, modules or stores."""
