"""Which inputs of every linear layer may be left out for a token: thresholds, chosen on a text; weights stay whole."""
