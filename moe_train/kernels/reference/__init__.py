"""Plain torch: the specification of every kernel, and what runs where Triton does not."""
