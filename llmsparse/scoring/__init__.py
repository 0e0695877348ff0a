"""What the routed experts of a mixture do on a text, and which of them matter."""
