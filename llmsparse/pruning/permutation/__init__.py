"""Orders of inputs under which N:M keeps more, and that fold away: the model computes what it did, in the same shapes."""
