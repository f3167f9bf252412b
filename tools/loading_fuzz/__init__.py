"""Parts of `fuzz_loading.py`: samples, mutations, routes, an independent reading of files, and forked processes."""
