"""Kernels of the losses: sums over images in blocks, with gradients written by hand.

The formulas stand in `ddp_ssl/losses/NAME.py`. A kernel gives the sums that they are made of.
"""
