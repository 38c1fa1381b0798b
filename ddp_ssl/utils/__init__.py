"""Small things that every room uses: seeds, files, texts, progress lines."""
