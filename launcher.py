"""Entry point in a clone: `python launcher.py recipe=NAME stage=STAGE key=value ...`; without arguments it runs the demo.

An installed package has the same as the command `yxanul`.
"""

from yxanul_nemo.launch.command import run_command

if __name__ == "__main__":
    run_command()
