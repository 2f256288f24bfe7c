"""Files of medical formats to NPY volumes and images, and phantoms that need no files."""
