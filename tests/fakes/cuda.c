/* A libcuda.so.1 that has the checkpoint calls and no GPU.
 *
 * The folder in FAKE_CUDA has a file for each process that uses a GPU, named after its number, with
 * the digit of its state. `ACTION.PID` there holds an error for that call; `ACTION.PID.hang` has it
 * never return. `log` is told of every call that changed something.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { RUNNING, LOCKED, CHECKPOINTED };

typedef struct { unsigned char from[16], to[16]; } Pair;
typedef struct { Pair *pairs; unsigned count; char reserved[44]; uint64_t reserved1; } RestoreArgs;

static void path_of(char *path, const char *name, int pid) {
    snprintf(path, 512, "%s/%s%d", getenv("FAKE_CUDA"), name, pid);
}

static int number_in(const char *path, int otherwise) {
    FILE *file = fopen(path, "r");
    int value = otherwise;
    if (file) {
        if (fscanf(file, "%d", &value) != 1) value = otherwise;
        fclose(file);
    }
    return value;
}

static int turn(const char *action, int pid, int from, int to) {
    char path[512], name[64];
    snprintf(name, sizeof name, "%s.", action);
    path_of(path, name, pid);
    int error = number_in(path, 0);
    strcat(path, ".hang");
    while (!access(path, F_OK)) usleep(10000);
    if (error) return error;
    path_of(path, "", pid);
    int state = number_in(path, -1);
    if (state < 0) return 3; /* CUDA_ERROR_NOT_INITIALIZED */
    if (state != from) return 401; /* CUDA_ERROR_ILLEGAL_STATE */
    FILE *file = fopen(path, "w");
    fprintf(file, "%d", to);
    fclose(file);
    snprintf(path, sizeof path, "%s/log", getenv("FAKE_CUDA"));
    file = fopen(path, "a");
    fprintf(file, "%s %d\n", action, pid);
    fclose(file);
    return 0;
}

int cuDriverGetVersion(int *version) {
    const char *told = getenv("FAKE_CUDA_VERSION");
    *version = told ? atoi(told) : 13000;
    return 0;
}

int cuInit(unsigned flags) { return flags ? 1 : 0; }

int cuGetErrorName(int error, const char **name) {
    switch (error) {
    case 1: *name = "CUDA_ERROR_INVALID_VALUE"; break;
    case 2: *name = "CUDA_ERROR_OUT_OF_MEMORY"; break;
    case 3: *name = "CUDA_ERROR_NOT_INITIALIZED"; break;
    case 401: *name = "CUDA_ERROR_ILLEGAL_STATE"; break;
    case 600: *name = "CUDA_ERROR_NOT_READY"; break;
    case 801: *name = "CUDA_ERROR_NOT_SUPPORTED"; break;
    default: *name = NULL; return 1;
    }
    return 0;
}

int cuCheckpointProcessGetState(int pid, int *state) {
    char path[512];
    path_of(path, "", pid);
    *state = number_in(path, -1);
    return *state < 0 ? 3 : 0;
}

int cuCheckpointProcessLock(int pid, unsigned *timeout_ms) {
    return *timeout_ms ? turn("lock", pid, RUNNING, LOCKED) : 1;
}

int cuCheckpointProcessCheckpoint(int pid, void *args) {
    (void)args;
    return turn("checkpoint", pid, LOCKED, CHECKPOINTED);
}

/* As the driver: a map that lacks a card (FAKE_CUDA_CARDS says how many there are) is refused. */
int cuCheckpointProcessRestore(int pid, RestoreArgs *args) {
    const char *cards = getenv("FAKE_CUDA_CARDS");
    if (args->count && cards && args->count != (unsigned)atoi(cards)) return 1;
    int error = turn("restore", pid, CHECKPOINTED, LOCKED);
    char path[512];
    snprintf(path, sizeof path, "%s/log", getenv("FAKE_CUDA"));
    FILE *file = error ? NULL : fopen(path, "a");
    for (unsigned i = 0; file && i < args->count; i++)
        fprintf(file, "pair %02x %02x\n", args->pairs[i].from[0], args->pairs[i].to[0]);
    if (file) fclose(file);
    return error;
}

int cuCheckpointProcessUnlock(int pid, void *args) {
    (void)args;
    return turn("unlock", pid, LOCKED, RUNNING);
}
