"""The evaluation protocols, one function for each."""
