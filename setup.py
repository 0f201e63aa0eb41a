"Reads settings.ini, the one source of truth, and hands it to setuptools."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
readme = here / "README.md"
parser = ConfigParser(delimiters=["="])
parser.read(here / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]

licenses = {"apache2": "Apache-2.0"}
statuses = {"3": "Development Status :: 3 - Alpha", "4": "Development Status :: 4 - Beta"}
minor = lambda version: int(version.split(".")[1])
versions = range(minor(cfg["min_python"]), minor(cfg["max_python"]) + 1)
pythons = [f"Programming Language :: Python :: 3.{n}" for n in versions]

words = lambda key: cfg.get(key, "").split()
extras = {key.removesuffix("_requirements"): words(key) for key in cfg if key.endswith("_requirements")}
extras["dev-core"] = extras["dev"]
extras["dev"] = extras["dev-core"] + extras["ray"] + extras["nussl"]

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    keywords=cfg["keywords"],
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    license=licenses[cfg["license"]],
    license_files=["LICENSE", "NOTICE"],
    classifiers=[
        statuses[cfg["status"]],
        f"Intended Audience :: {cfg['audience']}",
        f"Natural Language :: {cfg['language']}",
        "Topic :: Multimedia :: Sound/Audio :: Analysis",
        *pythons,
    ],
    packages=find_packages(include=[cfg["lib_path"], f"{cfg['lib_path']}.*"]),
    package_data={
        "": ["*.pyi"],
        cfg["lib_name"]: ["py.typed", "weights/*/*", "songs/*/*", "serving/desk_files/*"],
    },
    include_package_data=False,
    install_requires=words("requirements"),
    extras_require=extras,
    python_requires=f">={cfg['min_python']}",
    entry_points={
        "console_scripts": words("console_scripts"),
        "nbdev": [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"],
    },
    zip_safe=False,
)
