"""Images: reading them, splitting them by class, mini-batches of them."""
