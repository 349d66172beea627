"""Research on the drawn world, one file a study: ``python -m studies.<name>``. Their laboratory is in `studies.lab`."""
