"""How to do it fast: kernels that compute what `normwise.reference` says, for the devices and dtypes they name."""
