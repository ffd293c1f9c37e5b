"""One operation a file: kernel, launcher, torch.library op; reference.py holds the fp32 oracle of each."""
