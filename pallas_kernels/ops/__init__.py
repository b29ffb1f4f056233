"""Operations: one folder each, one file per implementation."""
