"""A real model and real text from package registries, for machines that reach no model hub."""
