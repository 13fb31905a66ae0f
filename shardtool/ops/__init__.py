"""Operations: what the commands do, without printing."""
