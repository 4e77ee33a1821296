"""Makes the image of the docker backend from Debian's packages, without a container registry.

    python -m cispo.sandboxes.build_image [TAG]

It needs root, `mmdebstrap` (Debian's package of that name) and a Docker daemon; it takes some 20 seconds. The image has
Python with its standard library, pytest and a shell, and neither a package manager's lists nor documentation.
"""

import argparse
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from cispo.errors import SandboxError
from cispo.sandboxes.docker_client import DEFAULT_IMAGE, connect

PACKAGES = ("python3", "python3-pytest", "dash", "bash", "coreutils", "base-files", "libc-bin")
LEFT_OUT = ("doc", "man", "locale", "info", "lintian")
# Packages are unpacked and not configured, and on a read-only root each program would compile what it imports anew.
COMPILE = 'chroot "$1" python3 -m compileall -q --invalidation-mode unchecked-hash /usr/lib/python3*'


def build_image(tag: str = DEFAULT_IMAGE) -> str:
    """Build the image and give it the name `tag`; returns its id. Raises SandboxError with what is missing."""
    if shutil.which("mmdebstrap") is None:
        raise SandboxError("the image is made by mmdebstrap, which is missing; run: apt-get install mmdebstrap")
    client = connect()
    with tempfile.TemporaryDirectory(prefix="cispo-image-") as folder:
        archive = Path(folder, "root.tar")
        left_out = " ".join(f'"$1"/usr/share/{name}' for name in LEFT_OUT)
        command = ["mmdebstrap", "--mode=root", "--variant=extract", f"--include={','.join(PACKAGES)}"]
        command += [f"--extract-hook=rm -rf {left_out}", f"--extract-hook={COMPILE}", *_suite_and_sources(archive)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise SandboxError(f"mmdebstrap failed: {done.stderr.strip()[-500:]}")
        client.api.import_image_from_file(str(archive), repository=tag)
    return str(client.images.get(tag).id)


def _suite_and_sources(archive: Path) -> list[str]:
    """This machine's own release and sources of packages; SandboxError when it is no Debian."""
    release = platform.freedesktop_os_release()
    if release.get("ID") != "debian":
        raise SandboxError(f"the image is made on Debian, and this is {release.get('ID')}; name any image of your own")
    sources = [Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*"))]
    used = [str(path) for path in sources if path.is_file() and path.suffix in (".list", ".sources")]
    return [release["VERSION_CODENAME"], str(archive), *used]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m cispo.sandboxes.build_image", description=__doc__)
    parser.add_argument("tag", nargs="?", default=DEFAULT_IMAGE, help=f"name of the image (default: {DEFAULT_IMAGE})")
    tag = parser.parse_args().tag
    try:
        print(f"{tag} is {build_image(tag)}")
    except SandboxError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
