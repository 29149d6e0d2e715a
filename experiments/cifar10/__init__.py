"""CIFAR-10, PreActResNet-18 and WRN-34-10: defenses with and without EMR, trained and attacked within given minutes."""
