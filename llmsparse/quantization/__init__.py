"""`llmsparse quantize`: weights become small integers, many of them 0, stored near their entropy."""
