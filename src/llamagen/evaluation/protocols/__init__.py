"""What is compared with what, and how: one function for each protocol."""
