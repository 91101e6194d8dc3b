"""The compression methods, one file each, behind one small contract."""
