"""The reward in the signatures of training libraries. Plain functions: none of the libraries is imported."""
