"""The store's two databases: the same tests run over both."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes import postgres_server


@pytest.fixture(scope="session")
def postgres_programs() -> Path:
    """PostgreSQL's programs, where the machine has them."""
    pytest.importorskip("asyncpg")
    programs = postgres_server.programs()
    if programs is None:
        pytest.skip("needs a PostgreSQL server (Debian: postgresql)")
    return programs


@pytest.fixture(scope="session")
def postgres_url(postgres_programs: Path) -> Iterator[str]:
    """A PostgreSQL that lives as long as the tests of this process."""
    with postgres_server.running(postgres_programs) as server:
        yield server.url


@pytest.fixture
def memory_folder() -> Iterator[Path]:
    """A folder on a file system in memory, where there is one: no test waits for a disk."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as folder:
        yield Path(folder)


@pytest.fixture(params=["sqlite", "postgresql"])
def store_url(request: pytest.FixtureRequest, memory_folder: Path) -> str:
    """Where a store may make its tables: nothing is there yet."""
    if request.param == "sqlite":
        return str(memory_folder / "offline.db")
    url: str = request.getfixturevalue("postgres_url")
    asyncio.run(_emptied(url))
    return url


async def _emptied(url: str) -> None:
    import asyncpg

    connection = await asyncpg.connect(url)
    tables = await connection.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
    names = [row[0] for row in tables if row[0] != "doherty_schema"]
    if names:  # emptied, which is quicker than made anew
        await connection.execute(f"TRUNCATE {', '.join(names)}")
    await connection.close()
