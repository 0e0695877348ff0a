"""Speed side by side with dense, and what can run on this machine."""
