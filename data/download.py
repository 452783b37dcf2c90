"""Downloads a data set of the CycleGAN family and leaves it ready for training.

    python data/download.py horse2zebra
    python aggan.py train --a data/horse2zebra/trainA --b data/horse2zebra/trainB

data/README.md lists the sets, with their sizes.
"""

import argparse
import http.client
import socket
import tempfile
import zipfile
import zlib
from pathlib import Path

from torchvision.datasets.utils import download_and_extract_archive

HOST = "https://efrosgans.eecs.berkeley.edu/cyclegan/datasets"
SETS = (
    "apple2orange",
    "cezanne2photo",
    "facades",
    "horse2zebra",
    "iphone2dslr_flower",
    "maps",
    "monet2photo",
    "summer2winter_yosemite",
    "ukiyoe2photo",
    "vangogh2photo",
)
PARTS = "trainA", "trainB", "testA", "testB"
DAMAGED = zipfile.BadZipFile, zlib.error, EOFError, RuntimeError  # the last: encrypted


def download(name, folder, host=HOST):
    """host/name.zip -> folder/name, with trainA, trainB, testA and testB in it; returns that path.

    All or nothing: it is downloaded and unpacked beside, then renamed; a kill leaves .download-*.
    OSError where the target exists or the archive cannot be had, ValueError where that is damaged
    or lacks a folder.
    """
    target, url = Path(folder, name), f"{host}/{name}.zip"
    if target.exists():
        line = f"{target}: exists already; remove it first, or name another --folder"
        raise FileExistsError(line)

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as beside:
        try:
            download_and_extract_archive(url, beside)
        except DAMAGED as error:  # torchvision takes a connection that broke for the end
            raise ValueError(f"{url}: did not arrive whole ({error}); try again") from None
        except (OSError, http.client.HTTPException) as error:
            raise OSError(f"{url}: not downloaded ({' '.join(str(error).split())})") from None

        new = Path(beside, name)
        missing = [
            part for part in PARTS if not (new / part).is_dir() or not any((new / part).iterdir())
        ]
        if missing:
            raise ValueError(f"{url}: has no {', '.join(missing)}")
        new.rename(target)
    return target


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    # one line, without usage
    parser.error = lambda line: parser.exit(2, f"{parser.prog}: error: {line}\n")
    here = Path(__file__).parent
    parser.add_argument("name", choices=SETS, help="which one: " + ", ".join(SETS), metavar="name")
    parser.add_argument("--folder", default=here, help="where to; default: this script's")
    where = "address that NAME.zip is under; default: %(default)s"
    parser.add_argument("--host", default=HOST, help=where)
    options = parser.parse_args(argv)

    socket.setdefaulttimeout(60)  # seconds of silence
    try:
        target = download(options.name, options.folder, options.host)
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted\n")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f'python aggan.py train --a "{target / "trainA"}" --b "{target / "trainB"}"')


if __name__ == "__main__":
    main()
