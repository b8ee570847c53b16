"""Reading 2:4 checkpoints that compressed-tensors wrote before it dropped 2:4 (up to 0.14): bitmask and Marlin-24."""
