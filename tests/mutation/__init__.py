"""Small bugs, planted everywhere in the CUDA sources, and the tests that must notice them. docs/mutation.md"""
