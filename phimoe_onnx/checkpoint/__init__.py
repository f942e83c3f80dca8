"""What people hand in: a checkpoint's tensors, in a folder or on the hub."""
