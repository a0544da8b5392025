"""The tests of ftrain; files mirror those of the package."""
