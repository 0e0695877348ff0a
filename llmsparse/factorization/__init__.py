"""A dense FFN becomes a mixture of experts: split, router, scale or refit, export.

`pipeline.factorize` is the whole path on a page. The package is named apart from the function, `llmsparse.factorize`,
which would otherwise be hidden by it as soon as one of these modules is imported.
"""
