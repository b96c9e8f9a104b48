"""A cluster that others run: sending studies there as jobs, following them, and reading what they have published."""
