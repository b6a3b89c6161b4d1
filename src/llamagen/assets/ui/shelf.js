// Images kept in this browser, with what they were made of. Whatever the browser refuses to keep
// is lost with the page, and no more.

export const MOST = 120;

const opened = open().catch(() => null);

// All entries, the oldest first.
export async function keptEntries() {
  return (await attempt("readonly", (store) => finished(store.getAll()))) ?? [];
}

// Keeps an entry; the oldest make room.
export async function keep(entry) {
  await attempt("readwrite", async (store) => {
    store.put(entry);
    const ids = await finished(store.getAllKeys());
    for (const id of ids.slice(0, Math.max(0, ids.length - MOST))) store.delete(id);
  });
}

export const forget = (id) => attempt("readwrite", (store) => finished(store.delete(id)));
export const forgetAll = () => attempt("readwrite", (store) => finished(store.clear()));

async function open() {
  const request = indexedDB.open("llamagen", 1);
  request.onupgradeneeded = () => request.result.createObjectStore("images", { keyPath: "id" });
  return finished(request);
}

async function attempt(mode, work) {
  try {
    const database = await opened;
    return await work(database.transaction("images", mode).objectStore("images"));
  } catch {
    return undefined;
  }
}

function finished(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}
