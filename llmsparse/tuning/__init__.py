"""A factorized model is trained for a few hundred steps to say what its dense teacher says.

`pipeline.tune` is the whole path on a page. The package is named apart from the function, `llmsparse.tune`.
"""
