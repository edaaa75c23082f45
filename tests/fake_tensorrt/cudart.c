/* A test double of libcudart: memory is the host's, work that was enqueued runs when its stream is waited for.

   With DOUBLE_LATE_COPIES a cudaMemcpy to the device arrives as late as CUDA allows ("API synchronization behavior": from
   pageable memory it returns once the bytes are staged): with the default stream's next operation, which a stream that
   was created not to wait for the default one does not wait for. */
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { OK = 0, INVALID_VALUE = 1, INVALID_HANDLE = 400, NOT_READY = 600, ILLEGAL_ADDRESS = 700, CAPTURE_UNSUPPORTED = 900,
       CAPTURE_INVALIDATED = 901, BLOCKS = 256, EVENTS = 64 };

static struct { char *start; size_t size; } blocks[BLOCKS];
static char stream;
static int (*work)(void);

void double_on_wait(int (*callback)(void)) { work = callback; }

/* What is captured is graph number 1, 2, ...; launching it enqueues the same work again: the module keeps the lists. */
static int capturing, graphs, enqueued_since_wait, captured;
static struct { int captured, instantiated; } graph_of[EVENTS];
static void (*launched)(int number);

void double_on_launch(void (*callback)(int number)) { launched = callback; }
int double_capturing(void) { return capturing; }
void double_enqueued(void) { capturing ? captured++ : enqueued_since_wait++; }

/* An event that was recorded before work gets the time at which this begins, one after it the time at which it ends. */
static struct { int made, recorded, after_work, done; double ms; } events[EVENTS];

static double now_ms(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return 1e3 * now.tv_sec + 1e-6 * now.tv_nsec;
}

static int fails(const char *word) {
    const char *words = getenv("FAKE_TENSORRT_FAIL");
    return words && strstr(words, word) != NULL;
}

static struct { void *to, *bytes; size_t size; } late;

static void arrive(void) {
    if (late.bytes) {
        memcpy(late.to, late.bytes, late.size);
        free(late.bytes);
        late.bytes = NULL;
    }
}

/* Bytes from an address to the end of its block; 0: it is no address of this "device". */
size_t double_bytes_at(char *address) {
    for (int i = 0; i < BLOCKS; i++)
        if (blocks[i].start && address >= blocks[i].start && address < blocks[i].start + blocks[i].size)
            return blocks[i].start + blocks[i].size - address;
    return 0;
}

int cudaMalloc(void **address, size_t size) {
    for (int i = 0; i < BLOCKS; i++)
        if (!blocks[i].start) {
            blocks[i].start = *address = malloc(size);
            blocks[i].size = size;
            return OK;
        }
    return 2; /* cudaErrorMemoryAllocation */
}

/* The host sees it under the same address; 1: from any stream. */
int cudaMallocManaged(void **address, size_t size, unsigned flags) {
    return flags == 1 ? cudaMalloc(address, size) : INVALID_VALUE;
}

int cudaFree(void *address) {
    for (int i = 0; i < BLOCKS; i++)
        if (blocks[i].start == (char *)address) {
            free(address);
            blocks[i].start = NULL;
            return OK;
        }
    return INVALID_VALUE;
}

int cudaMemcpy(void *to, const void *from, size_t size, int kind) {
    size_t to_device = double_bytes_at(to), from_device = double_bytes_at((char *)from);
    if ((kind == 1 && !to_device) || (kind == 2 && !from_device) || kind < 1 || kind > 4 || kind == 3)
        return INVALID_VALUE;
    if ((to_device && to_device < size) || (from_device && from_device < size) || !(to_device || from_device))
        return INVALID_VALUE;
    arrive();
    if (to_device && !from_device && getenv("DOUBLE_LATE_COPIES")) {
        late.to = to;
        late.size = size;
        late.bytes = malloc(size);
        memcpy(late.bytes, from, size);
        return OK;
    }
    memcpy(to, from, size);
    return OK;
}

int cudaRuntimeGetVersion(int *version) {
    *version = 12060;
    return OK;
}

int cudaStreamCreateWithFlags(void **created, unsigned flags) {
    *created = &stream;
    return flags == 1 ? OK : INVALID_VALUE;
}

int cudaStreamSynchronize(void *waited) {
    if (waited && waited != &stream) return INVALID_HANDLE;
    if (capturing) return CAPTURE_UNSUPPORTED;
    if (!waited) arrive();
    double begun = now_ms();
    int code = waited && work ? work() : OK;
    double ended = now_ms();
    for (int i = 0; i < EVENTS; i++)
        if (events[i].recorded && !events[i].done) {
            events[i].ms = events[i].after_work ? ended : begun;
            events[i].done = 1;
        }
    enqueued_since_wait = 0;
    return code;
}

int cudaEventCreateWithFlags(void **event, unsigned flags) {
    for (int i = 0; i < EVENTS; i++)
        if (!events[i].made) {
            events[i].made = 1;
            *event = &events[i];
            return flags == 0 ? OK : INVALID_VALUE; /* an event without timing has no elapsed time */
        }
    return INVALID_VALUE;
}

static int index_of(void *event) {
    for (int i = 0; i < EVENTS; i++)
        if (events[i].made && event == &events[i]) return i;
    return -1;
}

int cudaEventRecord(void *event, void *on) {
    int i = index_of(event);
    if (i < 0 || on != &stream) return INVALID_HANDLE;
    events[i].recorded = 1;
    events[i].done = 0;
    events[i].after_work = enqueued_since_wait > 0;
    return OK;
}

int cudaEventElapsedTime(float *ms, void *start, void *end) {
    int from = index_of(start), to = index_of(end);
    if (from < 0 || to < 0 || !events[from].recorded || !events[to].recorded) return INVALID_HANDLE;
    if (!events[from].done || !events[to].done) return NOT_READY;
    *ms = events[to].ms - events[from].ms;
    return OK;
}

int cudaStreamBeginCapture(void *on, int mode) {
    if (on != &stream || mode < 0 || mode > 2 || capturing || graphs + 1 == EVENTS) return INVALID_VALUE;
    capturing = ++graphs;
    captured = 0;
    return OK;
}

int cudaStreamEndCapture(void *on, void **graph) {
    if (on != &stream || !capturing) return INVALID_VALUE;
    capturing = 0;
    graph_of[graphs].captured = captured;
    *graph = captured ? &graph_of[graphs].captured : NULL;
    return fails("capture") ? CAPTURE_INVALIDATED : OK;
}

int cudaGraphInstantiateWithFlags(void **exec, void *graph, unsigned long long flags) {
    for (int i = 1; i <= graphs; i++)
        if (graph == &graph_of[i].captured && graph_of[i].captured && !flags) {
            graph_of[i].instantiated = 1;
            *exec = &graph_of[i].instantiated;
            return OK;
        }
    return INVALID_VALUE;
}

int cudaGraphLaunch(void *exec, void *on) {
    for (int i = 1; i <= graphs; i++)
        if (exec == &graph_of[i].instantiated && graph_of[i].instantiated && on == &stream) {
            launched(i);
            enqueued_since_wait++;
            return OK;
        }
    return INVALID_HANDLE;
}

int cudaGetLastError(void) { return OK; }

int cudaSetDeviceFlags(unsigned flags) { return flags == 1 ? OK : INVALID_VALUE; }

int cudaGetDeviceProperties(char *properties, int device) {
    if (device) return INVALID_VALUE;
    strcpy(properties, "Double of Orin");
    return OK;
}

int cudaDeviceSynchronize(void) {
    arrive();
    return work ? work() : OK;
}

int cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, void *on) {
    int code = cudaStreamSynchronize(on); /* in the order of the stream */
    if (!code) code = cudaMemcpy(to, from, size, kind);
    arrive();
    return code;
}

int cudaDeviceGetAttribute(int *value, int attribute, int device) {
    if (device != 0 || (attribute != 75 && attribute != 76)) return INVALID_VALUE;
    *value = attribute == 75 ? 8 : 7; /* compute capability 8.7 */
    return OK;
}
