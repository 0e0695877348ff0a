"""What calibration text says about a block: statistics of its inputs, outputs to match, equations to solve."""
