"""`python -m emr_kernels` prints what is installed and which backend serves which operator."""

from emr_kernels.info import info

if __name__ == "__main__":
    print(info())
