"""Storage: files that are whole or absent (`files`), the Hub (`hub`), model cards (`cards`)."""
