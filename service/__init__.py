"""voucherd: hands out voucher codes, one code to one request, for good."""

__version__ = "0.1.0"
