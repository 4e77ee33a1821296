"""The first program in a container: takes a command, files and stdin from its own stdin, then becomes the command.

Run by `python3 -c`, before anything of the program is there. A read-only container whose only writable folders are in
memory can be given files in no other way, and a container that waits for its command can be made in advance. The
request is marshalled, (command, files, stdin), behind a line with its length.
"""

import marshal
import os
import sys


def main() -> None:
    source = sys.stdin.buffer
    command, files, stdin = marshal.loads(source.read(int(source.readline())))
    for name, content in files.items():
        os.makedirs(os.path.dirname(os.path.abspath(name)), exist_ok=True)
        with open(name, "wb") as file:
            file.write(content)
    fd = os.memfd_create("stdin")
    view = memoryview(stdin)
    while view:
        view = view[os.write(fd, view) :]
    os.lseek(fd, 0, os.SEEK_SET)
    os.dup2(fd, 0)
    os.closerange(3, 256)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.stderr.write(f"{command[0]}: {error.strerror}\n")
        os._exit(127)


if __name__ == "__main__":
    main()
