"""`python -m posecrafter_rt` is the command `posecrafter-rt`.

Layer 8.
"""

from posecrafter_rt.cli.main import main

if __name__ == "__main__":
    main()
